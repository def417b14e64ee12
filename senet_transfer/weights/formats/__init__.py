"""Safe readers for weight files, which do not execute code from the file."""

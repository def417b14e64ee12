"""Text for messages."""


def shown(text: object, limit: int = 80) -> str:
    """Return untrusted text in a form fit for a message: short, on one line, printable."""
    words = "".join(c if c.isprintable() else " " for c in str(text)[: 4 * limit]).split()
    line = " ".join(words)
    return line if len(line) <= limit else line[: limit - 3] + "..."

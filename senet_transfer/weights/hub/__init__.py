"""Catalogue and download of published weights."""

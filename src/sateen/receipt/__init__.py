"""Receipts of measured quality, bytes and speed. Nothing here imports torch."""

from sateen.receipt.machine import hardware, versions
from sateen.receipt.schema import (
    JSON_NAME,
    MARKDOWN_NAME,
    SCHEMA,
    Receipt,
    ReceiptError,
    write_atomically,
)
from sateen.receipt.show import main

__all__ = [
    "JSON_NAME",
    "MARKDOWN_NAME",
    "SCHEMA",
    "Receipt",
    "ReceiptError",
    "hardware",
    "main",
    "versions",
    "write_atomically",
]

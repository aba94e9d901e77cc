"""graftlm: graft a new language, domain or task onto a pretrained language model."""

__version__ = "0.1.0"

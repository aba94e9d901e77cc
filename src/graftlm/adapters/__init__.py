"""What is added to a model: PEFT methods of our own."""

import peft as _peft  # noqa: F401  # first: what registers the methods runs at its end, and finds no module half imported

"""What is added to a model: PEFT methods of our own."""

"""Commands that are not a Trainer's: each module offers one function that takes the words after the command's name."""

"""The seats of a dialogue: messages in, an action out."""

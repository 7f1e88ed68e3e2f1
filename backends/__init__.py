"""What runs a policy: token ids in, token ids and log-probabilities out."""

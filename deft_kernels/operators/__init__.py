"""What autograd and torch.compile see: the losses over logits and hidden states with their backward."""

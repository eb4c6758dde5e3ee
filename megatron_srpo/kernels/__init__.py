"""What a policy's head and loss cost, made cheap: one operation a file, in torch's registry."""

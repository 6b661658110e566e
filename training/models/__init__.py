"""timm backbones, the heads on them, and their optimizers."""

"""What a training has brought: measured, predicted, told."""

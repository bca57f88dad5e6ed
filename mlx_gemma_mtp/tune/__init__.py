"""Trains a drafter for the target that it will draft for."""

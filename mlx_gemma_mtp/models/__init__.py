"""The target and its drafter: settings, shapes, modules, and whether they fit."""

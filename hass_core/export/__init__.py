"""Draft checkpoints as serving engines want them: layouts, a strict checker, export and import."""

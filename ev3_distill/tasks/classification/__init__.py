"""Classification: losses, per-example scores, steering goals and metric bounds."""

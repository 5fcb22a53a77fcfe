"""Export: deployable files, their re-assessment and the model card."""

"""Training: the LightningModule, what it is built from, and what a run keeps, reports and resumes."""

"""`Trainer.evaluate` and `Trainer.predict`."""

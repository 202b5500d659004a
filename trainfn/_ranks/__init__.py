"""The processes of a job, their exchanges on the host, and notes on their errors."""

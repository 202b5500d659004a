"""The processes of a job: what they exchange on the host, and notes on their errors."""

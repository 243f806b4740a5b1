"""What happens beside the steps of a run: the ledger, the samples written in validation, a clean stop."""

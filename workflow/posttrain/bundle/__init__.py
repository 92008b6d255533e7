"""What a reviewer is handed: a campaign's files with their checksums, as a Workflow Run RO-Crate without names."""

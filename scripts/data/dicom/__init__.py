"""DICOM: reading files and series, choosing a volume among them, and writing registrations. May import `data`."""

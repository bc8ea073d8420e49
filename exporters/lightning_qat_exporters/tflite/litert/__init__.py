"""The backend that converts with litert-torch."""

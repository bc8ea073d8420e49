"""All targets of one model: each tried and checked, whatever another one does; one manifest."""

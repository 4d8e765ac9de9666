"""The four packages under one name: `isthmus.split`, … are the folders of these names at the top of the repository."""

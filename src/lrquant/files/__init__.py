"""Files that are whole or absent, whoever writes beside us: locks, hashes, publishing."""

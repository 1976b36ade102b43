"""What people read and look at: tables, pictures, the report, the terminal."""

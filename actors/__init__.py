"""Ray, and only Ray: thin typed actors around the classes of onpolicy_skd.  No mathematics here."""

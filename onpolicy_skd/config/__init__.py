"""Settings: schema, rules between them, loading, plugins."""

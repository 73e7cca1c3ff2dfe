"""Pages at rest and decisions about them: windows, page tables, policies, the store on the host."""

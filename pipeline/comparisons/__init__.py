"""The paper's tables, one module for each: what is compared, with what, and how it is shown."""

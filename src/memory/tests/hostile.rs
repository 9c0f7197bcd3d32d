//! Frames that a hostile source may send, and what each is refused with.

//! Streams go through parcels and come out as they were; what is not sound comes to nobody.

mod sound;
mod streams;
mod unsound;

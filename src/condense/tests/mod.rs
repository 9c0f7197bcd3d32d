//! Streams go through parcels and come out as they were; what is not sound comes to nobody.

mod back;
mod gather;
mod sound;
mod splice;
mod split;
mod streams;
mod unsound;

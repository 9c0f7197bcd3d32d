//! NBD, as far as hypervisors speak it to their gateways to have disks mirrored.
//!
//! *Owns:* both ends of the protocol as bytes: the greeting, requests, replies. *Never:* what becomes of a request, a task, a
//! length that nobody bounded.
//!
//! The source's hypervisor is a client of its gateway, which takes changes and nothing else: writes, zeroes, discards, flushes.
//! The gateway of the destination is a client of its hypervisor. Each is on the same host, behind a socket that nobody else
//! may open; between the hosts no NBD is spoken. What the other side says is taken for hostile all the same.

mod client;
mod protocol;
mod server;
#[cfg(test)]
mod tests;

pub use client::{enter, read_block, read_reply, request};
pub use server::{NbdAsked, NbdExport, next_request, reply, welcome};

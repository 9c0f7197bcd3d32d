//! The `sealane` command.

use std::process::ExitCode;

/// WHY: buffers of frames and datagrams are large, come and go, and move between threads. glibc keeps what each thread has freed,
/// so that a gateway grew with every migration, or gives it back and has it mapped and cleared anew a moment later.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    sealane::cli::run()
}

//! The `sealane` command.

use std::ffi::{c_int, c_long};
use std::process::ExitCode;

/// WHY: buffers of frames and datagrams are large, come and go, and move between threads. glibc keeps what each thread has freed,
/// so that a gateway grew with every migration, or gives it back and has it mapped and cleared anew a moment later.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    give_back_soon();
    sealane::cli::run()
}

/// WHY: by itself the allocator keeps what is free for a second, and looks at it only when it is asked for more: after a hundred small
/// VMs at once a gateway kept 130 to 170 MiB, and 60 to 75 with this. Less than 0.1 s has buffers cleared anew between two frames.
#[expect(unsafe_code, reason = "the allocator has no other way to be told")]
fn give_back_soon() {
    /// `mi_option_purge_delay` of `mimalloc.h`, version 3; `MIMALLOC_PURGE_DELAY` still sets it from outside.
    const PURGE_DELAY: c_int = 15;
    const MILLISECONDS: c_long = 100;
    // SAFETY: as `mimalloc.h` declares it.
    unsafe extern "C" {
        fn mi_option_set_default(option: c_int, value: c_long);
    }
    // SAFETY: it changes one number of the allocator's own, before there is another thread, and ignores an option that there is not.
    unsafe { mi_option_set_default(PURGE_DELAY, MILLISECONDS) }
}

//! How a guest ended.

use std::fmt;

/// How a guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitVerdict {
    /// The guest's own verdict on the debug-exit port; 0 is fine.
    Code(u32),
    /// The guest asked for a reset, which this VMM takes as its end.
    Reset,
    /// Triple fault.
    Shutdown,
    /// The VMM was told to quit.
    Quit,
    /// KVM gave up on the guest.
    Failed(String),
}

impl ExitVerdict {
    /// The verdict as one number, for processes and protocols: 0 is fine.
    #[must_use]
    pub fn code(&self) -> u32 {
        match self {
            Self::Code(code) => *code,
            Self::Reset | Self::Quit => 0,
            Self::Shutdown => 0xffff_fffe,
            Self::Failed(_) => u32::MAX,
        }
    }
}

impl fmt::Display for ExitVerdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(0) => f.write_str("the guest ended cleanly"),
            Self::Code(code) => write!(f, "the guest stopped with code {code:#x}"),
            Self::Reset => f.write_str("the guest asked for a reset"),
            Self::Shutdown => f.write_str("the guest ended in a triple fault"),
            Self::Quit => f.write_str("the VMM was told to quit"),
            Self::Failed(reason) => write!(f, "the guest cannot go on: {reason}"),
        }
    }
}

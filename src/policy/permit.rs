//! The proof that a question was answered with yes. Nothing outside this module's folder makes one.

use std::marker::PhantomData;

use crate::policy::facts::Stream;
use crate::policy::obligations::Obligations;
use crate::types::VmUuid;

mod sealed {
    pub trait Sealed {}
}

/// One of the questions that policy answers.
pub trait Action: sealed::Sealed {
    /// Its name in the schema.
    const NAME: &'static str;
}

macro_rules! actions {
    ($($(#[$doc:meta])* $type:ident = $name:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Debug)]
        pub enum $type {}
        impl sealed::Sealed for $type {}
        impl Action for $type {
            const NAME: &'static str = $name;
        }
    )*};
}
actions! {
    /// An operator may ask for this move.
    Request = "request";
    /// The peer may have the VM.
    Release = "release";
    /// The peer may give the VM.
    Accept = "accept";
    /// The switch may happen.
    Commit = "commit";
    /// An operator may decide the fate of a VM in doubt.
    Resolve = "resolveInDoubt";
}

/// Policy said yes to `A`, for this principal, this VM and these terms. It cannot be copied: whoever spends it
/// has to ask again for the next time.
#[derive(Debug)]
#[must_use = "a permit is what allows the next step; pass it on"]
pub struct Permit<A: Action> {
    policy_ids: Vec<String>,
    set_digest: [u8; 32],
    principal: String,
    vm: VmUuid,
    stream: Option<Stream>,
    obligations: Obligations,
    action: PhantomData<fn() -> A>,
}

impl<A: Action> Permit<A> {
    pub(super) fn new(
        policy_ids: Vec<String>,
        set_digest: [u8; 32],
        principal: String,
        vm: VmUuid,
        stream: Option<Stream>,
        obligations: Obligations,
    ) -> Self {
        Self { policy_ids, set_digest, principal, vm, stream, obligations, action: PhantomData }
    }

    /// The question's name in the schema.
    #[must_use]
    pub fn action(&self) -> &'static str {
        A::NAME
    }

    /// The `@id`s of the policies that permitted it, sorted.
    #[must_use]
    pub fn policy_ids(&self) -> &[String] {
        &self.policy_ids
    }

    /// Digest of the policy set that was asked.
    #[must_use]
    pub fn set_digest(&self) -> &[u8; 32] {
        &self.set_digest
    }

    /// Whom it is for: the peer's SPIFFE ID, or the operator.
    #[must_use]
    pub fn principal(&self) -> &str {
        &self.principal
    }

    /// The VM it is for.
    #[must_use]
    pub fn vm(&self) -> VmUuid {
        self.vm
    }

    /// The stream terms it is for, which may be stricter than those asked about; none for [`Resolve`].
    #[must_use]
    pub fn stream(&self) -> Option<&Stream> {
        self.stream.as_ref()
    }

    /// What the permits ask of the stream; [`stream`](Self::stream) does it, and a limit of bandwidth is for the source to keep.
    #[must_use]
    pub fn obligations(&self) -> &Obligations {
        &self.obligations
    }

    /// Whether it is for exactly this: check it where it is spent, if the terms came a different way.
    #[must_use]
    pub fn covers(&self, principal: &str, vm: VmUuid, stream: &Stream) -> bool {
        self.principal == principal && self.vm == vm && self.stream.as_ref() == Some(stream)
    }
}

//! Which circumstances policies read. The others are not made into Cedar values, which takes longer than to decide.
//!
//! INVARIANT(no-skipped-forbid): a circumstance is left out only where no candidate says its path, and nothing that it is a part of is
//! used as a whole; what is not understood reads everything. So no policy can tell the difference.

use std::sync::Arc;

use cedar_policy::Policy;
use cedar_policy::pst::Expr;

use crate::policy::lint::{clauses, parts, path};

/// One circumstance; its number is its place in [`PATHS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fact {
    Now,
    SrcSite,
    DstSite,
    PeerIp,
    Tls,
    Kx,
    Suite,
    CrlFresh,
    PeerCertDaysLeft,
    Mode,
    Compression,
    CompressionScope,
    LengthPadding,
    Durability,
    Lanes,
    Storage,
    MemoryMib,
    DiskCount,
    DiskMib,
    ChangeTicket,
    Approvers,
    FenceEvidence,
}

/// Where policies find each, in order of [`Fact`].
const PATHS: [&str; 22] = [
    "context.now",
    "context.route.srcSite",
    "context.route.dstSite",
    "context.route.peerIp",
    "context.channel.tls",
    "context.channel.kx",
    "context.channel.suite",
    "context.channel.crlFresh",
    "context.channel.peerCertDaysLeft",
    "context.stream.mode",
    "context.stream.compression",
    "context.stream.compressionScope",
    "context.stream.lengthPadding",
    "context.stream.durability",
    "context.stream.lanes",
    "context.stream.storage",
    "context.memoryMiB",
    "context.diskCount",
    "context.diskMiB",
    "context.changeTicket",
    "context.approvers",
    "context.fenceEvidence",
];

impl Fact {
    /// Its name in the record that it is a part of.
    pub(super) fn name(self) -> &'static str {
        let path = PATHS.get(self as usize).copied().unwrap_or_default();
        path.rsplit_once('.').map_or(path, |(_, name)| name)
    }
}

/// A set of circumstances: one bit each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Reads(u32);

impl Reads {
    pub(super) const NONE: Self = Self(0);
    pub(super) const ALL: Self = Self(u32::MAX);

    pub(super) fn has(self, fact: Fact) -> bool {
        self.0 & (1 << fact as u32) != 0
    }

    pub(super) fn and(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// What the conditions of a policy read; scopes read none.
    pub(super) fn of(policy: &Policy) -> Self {
        let Ok(policy) = policy.to_pst() else { return Self::ALL };
        let mut reads = Self::NONE;
        let mut todo: Vec<&Arc<Expr>> = clauses(&policy).collect();
        while let Some(expr) = todo.pop() {
            let said = match expr.as_ref() {
                Expr::HasAttr { expr, attrs } => path(expr).map(|path| format!("{path}.{}", attrs.first())),
                other => path(other),
            };
            match (said, parts(expr)) {
                // The whole path, so its beginning is not looked at by itself.
                (Some(said), _) => reads = reads.and(Self::at(&said)),
                (None, Some(parts)) => todo.extend(parts),
                (None, None) => return Self::ALL,
            }
        }
        reads
    }

    /// What a path reads: itself, and everything that it has below it.
    fn at(said: &str) -> Self {
        if said != "context" && !said.starts_with("context.") {
            return Self::NONE;
        }
        let below = |longer: &str, shorter: &str| longer.strip_prefix(shorter).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        let found = (0..).zip(PATHS).filter(|(_, path)| below(path, said) || below(said, path));
        let bits = found.fold(0, |bits, (number, _)| bits | 1_u32 << number);
        // A name that is none of ours may be anything.
        if bits == 0 { Self::ALL } else { Self(bits) }
    }
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use super::*;

    const EACH: [Fact; 22] = [
        Fact::Now,
        Fact::SrcSite,
        Fact::DstSite,
        Fact::PeerIp,
        Fact::Tls,
        Fact::Kx,
        Fact::Suite,
        Fact::CrlFresh,
        Fact::PeerCertDaysLeft,
        Fact::Mode,
        Fact::Compression,
        Fact::CompressionScope,
        Fact::LengthPadding,
        Fact::Durability,
        Fact::Lanes,
        Fact::Storage,
        Fact::MemoryMib,
        Fact::DiskCount,
        Fact::DiskMib,
        Fact::ChangeTicket,
        Fact::Approvers,
        Fact::FenceEvidence,
    ];

    fn read_by(condition: &str) -> Vec<&'static str> {
        let policy = Policy::from_str(&format!("permit (principal, action, resource) when {{ {condition} }};")).unwrap();
        let reads = Reads::of(&policy);
        EACH.into_iter().filter(|fact| reads.has(*fact)).map(Fact::name).collect()
    }

    #[test]
    fn what_is_said_is_read_and_nothing_else() {
        assert_eq!(EACH.map(|fact| fact as usize).to_vec(), (0..PATHS.len()).collect::<Vec<_>>());
        let stream = ["mode", "compression", "compressionScope", "lengthPadding", "durability", "lanes", "storage"];
        let channel = ["tls", "kx", "suite", "crlFresh", "peerCertDaysLeft"];
        for (condition, expected) in [
            ("true", &[][..]),
            ("principal.site == resource.tenant && resource has tenant", &[]),
            ("context.route.peerIp.isInRange(ip(\"10.0.0.0/8\"))", &["peerIp"]),
            ("[context.memoryMiB, 1].contains(context.stream.lanes)", &["lanes", "memoryMiB"]),
            ("if context.channel.crlFresh then principal.site == context.route.dstSite else false", &["dstSite", "crlFresh"]),
            ("context has changeTicket && context.changeTicket like \"CHG-*\"", &["changeTicket"]),
            ("context has stream.lanes", &stream),
            ("context.stream has lanes", &["lanes"]),
            ("context[\"now\"] < datetime(\"2030-01-01\")", &["now"]),
            ("{ it: context.channel } == { it: context.channel }", &channel),
            ("(if true then context.channel else context.channel).crlFresh", &channel),
            ("context.approvers.contains(principal) || context.fenceEvidence", &["approvers", "fenceEvidence"]),
        ] {
            assert_eq!(read_by(condition), expected, "{condition}");
        }
    }

    #[test]
    fn the_whole_context_and_what_is_not_known_read_everything() {
        for condition in [
            "context == context",
            "[context].contains(context)",
            "{ it: context }.it.stream.lanes == 1",
            "context has other",
            "context.other.of == 1",
        ] {
            assert_eq!(read_by(condition).len(), PATHS.len(), "{condition}");
        }
    }
}

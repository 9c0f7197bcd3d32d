//! Whether questions have the shape that the schema wants.
//!
//! What a question carries is made by `facts.rs` and `entities.rs` from typed values, so it has one shape for each kind of question, and
//! whether that fits the schema does not depend on who asks about what. It is compared when a set is loaded, with one question of each
//! kind, and not with every question. INVARIANT(no-skipped-forbid): a set whose schema wants something else does not load.

use std::net::IpAddr;

use cedar_policy::Schema;

use crate::policy::ask::Question;
use crate::policy::entities::uid;
use crate::policy::facts::{
    Channel, Codec, CodecScope, Durability, MigrationContext, Mode, RequestContext, ResolveContext, Route, Storage, Stream,
};
use crate::policy::reads::Reads;
use crate::types::{SpiffeId, VmUuid};

/// Compares one question of each kind, with everything that may be there and without it.
pub(super) fn check(schema: &Schema) -> Result<(), String> {
    let stream = Stream {
        mode: Mode::Precopy,
        compression: Codec::None,
        compression_scope: CodecScope::Page,
        length_padding: false,
        durability: Durability::None,
        lanes: 1,
        storage: Storage::None,
    };
    let route = Route { src_site: String::new(), dst_site: String::new(), peer_ip: IpAddr::from([127, 0, 0, 1]) };
    let channel = Channel { tls: String::new(), kx: String::new(), suite: String::new(), crl_fresh: false, peer_cert_days_left: 0 };
    let (memory_mib, disk_count, disk_mib) = (0, 0, 0);
    let migration =
        MigrationContext { now_unix_ms: 0, route: route.clone(), channel, stream: stream.clone(), memory_mib, disk_count, disk_mib };
    let plain = RequestContext { now_unix_ms: 0, route, stream, change_ticket: None };
    let with_ticket = RequestContext { change_ticket: Some(String::new()), ..plain.clone() };
    let resolve = ResolveContext { now_unix_ms: 0, approvers: vec!["uid:0".to_owned()], fence_evidence: false };
    let peer: SpiffeId = "spiffe://shape/of".parse().map_err(|error| format!("{error}"))?;
    let all = [
        Question::Request("uid:0", &plain),
        Question::Request("uid:0", &with_ticket),
        Question::Release(&peer, &migration),
        Question::Accept(&peer, &migration),
        Question::Commit(&peer, &migration),
        Question::Resolve("uid:0", &resolve),
    ];
    all.iter().try_for_each(|question| fits(question, schema))
}

/// Whether a question fits the schema, by Cedar's own comparison.
pub(super) fn fits(question: &Question<'_>, schema: &Schema) -> Result<(), String> {
    let (principal, action) = (question.principal_uid()?, uid("Action", question.action())?);
    let resource = uid("Vm", &VmUuid([0; 16]).to_string())?;
    let request = cedar_policy::Request::new(principal, action, resource, question.context(None, Reads::ALL)?, Some(schema));
    request.map(drop).map_err(|error| format!("`{}` does not fit the schema: {error}", question.action()))
}

#[cfg(test)]
mod tests {
    use std::str::FromStr;

    use super::*;
    use crate::policy::SCHEMA;

    #[test]
    fn questions_fit_the_schema_and_no_other() {
        let schema = |from: &str, to: &str| {
            assert!(SCHEMA.contains(from), "{from}");
            Schema::from_str(&SCHEMA.replace(from, to)).unwrap()
        };
        check(&schema("lanes: Long", "lanes: Long")).unwrap();
        for (from, to) in
            [("lanes: Long", "lanes: String"), ("crlFresh: Bool", "crlFresh: Bool, other: Bool"), ("fenceEvidence: Bool", "fence: Bool")]
        {
            let error = check(&schema(from, to)).unwrap_err();
            assert!(error.contains("does not fit the schema"), "{error}");
        }
    }
}

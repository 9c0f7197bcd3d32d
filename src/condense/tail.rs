//! The device sections of a stream. How long one is only its device knows, but the stream lists them behind the last.

use serde::Deserialize;

use super::Unsound;
use super::look::{Look, Stop};
use super::walk::{DESCRIPTION, EOF, FOOTER, FULL};
use crate::limits;

/// What QEMU says of its stream in its stream.
#[derive(Debug, Deserialize)]
struct Description {
    page_size: u64,
    devices: Vec<Device>,
}

#[derive(Debug, Deserialize)]
struct Device {
    name: String,
    instance_id: u32,
    #[serde(flatten)]
    state: Part,
}

/// Fields, then parts that are there only when they are needed.
#[derive(Debug, Default, Deserialize)]
struct Part {
    #[serde(default)]
    vmsd_name: String,
    #[serde(default)]
    fields: Vec<Field>,
    #[serde(default)]
    subsections: Vec<Self>,
}

#[derive(Debug, Deserialize)]
struct Field {
    #[serde(default)]
    size: u64,
    /// How many there are, all of that size.
    #[serde(default = "one")]
    array_len: u64,
}

fn one() -> u64 {
    1
}

impl Part {
    /// Bytes of it, by what it says itself.
    fn bytes(&self) -> u64 {
        let fields = self.fields.iter().map(|field| field.size.saturating_mul(field.array_len));
        let parts = self.subsections.iter().map(|part| part.bytes().saturating_add(part.vmsd_name.len() as u64 + PART_HEAD));
        fields.chain(parts).fold(0, u64::saturating_add)
    }
}

/// Sees that `tail` has the sections that it lists, in that order, and nothing else; false when it lists none.
///
/// # Errors
/// It has others, or the list is none.
pub(super) fn check(tail: &[u8]) -> Result<bool, Unsound> {
    let Some((end, end_of_text)) = end_of_sections(tail) else { return Ok(false) };
    let (text, rest) = tail.split_at(end_of_text);
    if !rest.is_empty() {
        return Err(nothing_more(end_of_text as u64, rest));
    }
    let unsound = |at: usize, expected, got: &str| Unsound { at: at as u64, expected, got: got.chars().take(200).collect() };
    let text = text.get(end + DESCRIPTION_HEAD..).unwrap_or_default();
    let description: Description =
        serde_json::from_slice(text).map_err(|error| unsound(end, "a description of device sections", &error.to_string()))?;
    if description.devices.len() > limits::QEMU_DEVICES_MAX || description.page_size != crate::types::PAGE_BYTES as u64 {
        return Err(unsound(end, "a bounded list of devices, and pages of 4 KiB", &format!("{} devices", description.devices.len())));
    }
    let mut at = 0;
    for (index, device) in description.devices.iter().enumerate() {
        let (id, head) = head_of(tail.get(at..end).unwrap_or_default(), device)
            .ok_or_else(|| unsound(at, "the section of the device that is listed", &device.name))?;
        let body = tail.get(at + head..end).unwrap_or_default();
        let next = description.devices.get(index + 1);
        let bytes = body_bytes(body, id, device, next).ok_or_else(|| unsound(at, "the end of the section of a device", &device.name))?;
        at += head + bytes + FOOTER_BYTES;
    }
    if at != end {
        return Err(unsound(at, "no device that is not listed", &format!("{} bytes", end - at)));
    }
    Ok(true)
}

/// Something behind the list of devices.
pub(super) fn nothing_more(at: u64, rest: &[u8]) -> Unsound {
    Unsound { at, expected: "the end of the stream", got: format!("{} bytes more", rest.len()) }
}

/// Whether `tail` may be all of it: so long as more may come it is asked again.
pub(super) fn looks_whole(tail: &[u8]) -> bool {
    tail.last() == Some(&b'}') && end_of_sections(tail).is_some_and(|(_, end)| end == tail.len())
}

/// Where the sections end, before a description, and where that ends.
fn end_of_sections(tail: &[u8]) -> Option<(usize, usize)> {
    let description = |at: usize, head: &[u8]| match head {
        [EOF, DESCRIPTION, length @ .., b'{'] => {
            let length = length.try_into().map(u32::from_be_bytes).ok().and_then(|length| usize::try_from(length).ok())?;
            let end = at + DESCRIPTION_HEAD + length;
            (tail.get(at + DESCRIPTION_HEAD..end)?.last() == Some(&b'}')).then_some((at, end))
        }
        _ => None,
    };
    tail.windows(DESCRIPTION_HEAD + 1).enumerate().find_map(|(at, head)| description(at, head))
}

/// The number of a section that begins here and is of `device`, and the bytes in front of its body.
fn head_of(bytes: &[u8], device: &Device) -> Option<(u32, usize)> {
    let mut look = Look::new(bytes, 0);
    let mut read = || -> Result<Option<u32>, Stop> {
        let (kind, id, name, instance) = (look.u8()?, look.u32()?, look.short_name()?, look.u32()?);
        // Its version.
        look.u32()?;
        Ok((kind == FULL && name == device.name && instance == device.instance_id).then_some(id))
    };
    let id = read().ok().flatten()?;
    Some((id, look.at()))
}

/// How long the body of section `id` is, which is of `device`: behind it stands the section of `next`, or nothing.
fn body_bytes(bytes: &[u8], id: u32, device: &Device, next: Option<&Device>) -> Option<usize> {
    let [a, b, c, d] = id.to_be_bytes();
    let footer = [FOOTER, a, b, c, d];
    let ends_at = |at: usize| {
        let behind = bytes.get(at..).and_then(|rest| rest.strip_prefix(&footer));
        behind.is_some_and(|behind| next.map_or(behind.is_empty(), |next| head_of(behind, next).is_some()))
    };
    // A device whose description is not exact is looked for where its section could end.
    let described = usize::try_from(device.state.bytes()).ok().filter(|at| ends_at(*at));
    described.or_else(|| (0..bytes.len()).find(|at| ends_at(*at)))
}

/// Of a part that is there only when it is needed: its type, the length of its name, its version.
const PART_HEAD: u64 = 6;
const FOOTER_BYTES: usize = 5;
/// The end of the sections, the type of what follows, and its length.
const DESCRIPTION_HEAD: usize = 6;

//! The `"schema"` member that versions every JSON object we print.

/// Declares a unit type that is written as one fixed string and reads back nothing else.
macro_rules! schema_tag {
    ($(#[$doc:meta])* $name:ident = $text:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
        pub struct $name;

        impl $name {
            /// The value of the `"schema"` member.
            pub const TEXT: &'static str = $text;
        }

        impl ::serde::Serialize for $name {
            fn serialize<S: ::serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.serialize_str(Self::TEXT)
            }
        }

        impl<'de> ::serde::Deserialize<'de> for $name {
            fn deserialize<D: ::serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = <::std::borrow::Cow<'de, str> as ::serde::Deserialize>::deserialize(deserializer)?;
                if text == Self::TEXT {
                    Ok(Self)
                } else {
                    Err(::serde::de::Error::custom(format_args!("expected schema `{}`, got `{text}`", Self::TEXT)))
                }
            }
        }
    };
}
pub(crate) use schema_tag;

schema_tag!(
    /// Schema of [`Progress`](super::Progress).
    ProgressSchema = "sealane.progress/1"
);
schema_tag!(
    /// Schema of [`Report`](super::Report).
    ReportSchema = "sealane.report/1"
);

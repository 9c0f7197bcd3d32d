//! Keys in a token, by the library of whoever made it.

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::mechanism::eddsa::{EddsaParams, EddsaSignatureScheme};
use cryptoki::mechanism::rsa::{PkcsMgfType, PkcsPssParams};
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, AttributeType, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, UserType};
use cryptoki::slot::{Slot, TokenInfo};
use cryptoki::types::AuthPin;
use ring::digest;
use ring::rand::{SecureRandom, SystemRandom};
use rustls::SignatureScheme;
use rustls::pki_types::SubjectPublicKeyInfoDer;

use super::process::InUse;
use super::{Keys, Refusal, TokenPlace, kind_of, raw};
use crate::identity::IdentityError;
use crate::identity::keys::{ED25519_SPKI, read_private};
use crate::identity::strength;
use crate::limits;
use crate::types::TokenUri;
use crate::wire::ErrorClass;

/// Why a token cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ModuleError {
    /// The PIN's file.
    #[error("the PIN of the token")]
    Pin(#[from] IdentityError),
    /// The library, or the token, said so.
    #[error("PKCS#11: {0}")]
    Library(#[from] Error),
    /// What is there is not what the URI names.
    #[error("`{uri}` names {found}: expected {expected}")]
    Count {
        /// The URI.
        uri: TokenUri,
        /// How many.
        found: String,
        /// How many are wanted.
        expected: &'static str,
    },
    /// A PIN was wrong once; a second try could lock the token.
    #[error("the token refused its PIN, which is not tried again until the gateway is started anew")]
    PinRefused,
    /// There is a login and nothing to log in with.
    #[error("the token wants a PIN: `identity.pkcs11_pin` names none")]
    NoPin,
    /// A key of the gateway's that is not there, or a scheme that nobody speaks.
    #[error("cannot sign: {0}")]
    Cannot(&'static str),
}

/// A token that was found, and its keys.
pub struct Opened {
    library: Pkcs11,
    uri: TokenUri,
    pin: Option<AuthPin>,
    pin_refused: bool,
    /// A session, and all private keys that the URI names.
    open: Option<(Session, Vec<ObjectHandle>)>,
    /// Those that the gateway signs with; none where a session has ended since one was found.
    used: InUse<Option<ObjectHandle>>,
}

impl std::fmt::Debug for Opened {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opened").field("uri", &self.uri).finish_non_exhaustive()
    }
}

/// The PIN, read while this process may still read it.
///
/// # Errors
/// The file cannot be read, or others than its owner may.
pub fn read_pin(place: &TokenPlace) -> Result<Option<AuthPin>, ModuleError> {
    let Some(path) = &place.pin else { return Ok(None) };
    let bytes = read_private(path, "PIN of a token")?;
    let wrong = || IdentityError::Malformed { what: "PIN of a token", path: path.clone(), expected: "one line of text" };
    let text = String::from_utf8(bytes).map_err(|_| wrong())?;
    let pin = text.strip_suffix('\n').unwrap_or(&text);
    if pin.is_empty() || pin.contains(['\n', '\0']) {
        return Err(wrong().into());
    }
    Ok(Some(AuthPin::new(pin.into())))
}

impl Opened {
    /// Loads the library and finds the key.
    ///
    /// # Errors
    /// It cannot be loaded, or there is not one such token with such a key.
    pub fn begin(place: &TokenPlace, pin: Option<AuthPin>) -> Result<Self, ModuleError> {
        let library = Pkcs11::new(&place.module)?;
        library.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))?;
        let mut opened = Self { library, uri: place.uri.clone(), pin, pin_refused: false, open: None, used: InUse::new() };
        opened.keys()?;
        Ok(opened)
    }

    /// The session and the keys that the URI names, found anew where something went wrong before.
    fn keys(&mut self) -> Result<&(Session, Vec<ObjectHandle>), ModuleError> {
        let open = match self.open.take() {
            Some(open) => open,
            None => self.open()?,
        };
        Ok(self.open.insert(open))
    }

    fn open(&mut self) -> Result<(Session, Vec<ObjectHandle>), ModuleError> {
        let (slot, token) = self.token()?;
        let session = self.library.open_ro_session(slot)?;
        if token.login_required() {
            self.log_in(&session, &token)?;
        }
        let keys = session.find_objects(&self.named(ObjectClass::PRIVATE_KEY))?;
        if keys.is_empty() || keys.len() > usize::from(limits::TOKEN_KEYS_MAX) {
            let found = format!("{} private keys", keys.len());
            return Err(ModuleError::Count { uri: self.uri.clone(), found, expected: "at least one, and few" });
        }
        Ok((session, keys))
    }

    /// What an object of the URI has.
    fn named(&self, class: ObjectClass) -> Vec<Attribute> {
        let mut wanted = vec![Attribute::Class(class)];
        wanted.extend(self.uri.attribute("object").map(|label| Attribute::Label(label.to_vec())));
        wanted.extend(self.uri.attribute("id").map(|id| Attribute::Id(id.to_vec())));
        wanted
    }

    /// Ends the session: keys may have been added since, or it has gone with its token.
    fn close(&mut self) {
        self.open = None;
        self.used.each().for_each(|key| *key = None);
    }

    fn token(&self) -> Result<(Slot, TokenInfo), ModuleError> {
        let mut found = Vec::new();
        for slot in self.library.get_slots_with_token()? {
            // A slot whose token goes away at this moment is none.
            let Ok(token) = self.library.get_token_info(slot) else { continue };
            let says = |name: &str| match name {
                "token" => token.label(),
                "serial" => token.serial_number(),
                "manufacturer" => token.manufacturer_id(),
                _ => token.model(),
            };
            if token.token_initialized() && self.uri.names_token(says) {
                found.push((slot, token));
            }
        }
        let count = found.len();
        match found.pop() {
            Some(one) if count == 1 => Ok(one),
            _ => Err(ModuleError::Count { uri: self.uri.clone(), found: format!("{count} tokens that are there"), expected: "one" }),
        }
    }

    fn log_in(&mut self, session: &Session, token: &TokenInfo) -> Result<(), ModuleError> {
        if self.pin_refused {
            return Err(ModuleError::PinRefused);
        }
        if self.pin.is_none() && !token.protected_authentication_path() {
            return Err(ModuleError::NoPin);
        }
        match session.login(UserType::User, self.pin.as_ref()) {
            Ok(()) | Err(Error::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => Ok(()),
            Err(Error::Pkcs11(RvError::PinIncorrect | RvError::PinLocked | RvError::PinExpired | RvError::PinInvalid, _)) => {
                self.pin_refused = true;
                Err(ModuleError::PinRefused)
            }
            Err(error) => Err(error.into()),
        }
    }

    fn sign_with(&mut self, key: ObjectHandle, scheme: SignatureScheme, message: &[u8]) -> Result<Vec<u8>, ModuleError> {
        let (session, _) = self.keys()?;
        let pss = |hash_alg, mgf, bytes: u64| PkcsPssParams { hash_alg, mgf, s_len: bytes.into() };
        let of_digest = |algorithm| {
            let digest = digest::digest(algorithm, message);
            let raw = session.sign(&Mechanism::Ecdsa, key, digest.as_ref())?;
            raw::ecdsa_der(&raw).ok_or(ModuleError::Cannot("a signature of another length than the curve's"))
        };
        match scheme {
            SignatureScheme::ECDSA_NISTP256_SHA256 => of_digest(&digest::SHA256),
            SignatureScheme::ECDSA_NISTP384_SHA384 => of_digest(&digest::SHA384),
            SignatureScheme::ED25519 => {
                Ok(session.sign(&Mechanism::Eddsa(EddsaParams::new(EddsaSignatureScheme::Ed25519)), key, message)?)
            }
            SignatureScheme::RSA_PSS_SHA256 => {
                let pss = pss(MechanismType::SHA256, PkcsMgfType::MGF1_SHA256, 32);
                Ok(session.sign(&Mechanism::Sha256RsaPkcsPss(pss), key, message)?)
            }
            SignatureScheme::RSA_PSS_SHA384 => {
                let pss = pss(MechanismType::SHA384, PkcsMgfType::MGF1_SHA384, 48);
                Ok(session.sign(&Mechanism::Sha384RsaPkcsPss(pss), key, message)?)
            }
            SignatureScheme::RSA_PSS_SHA512 => {
                let pss = pss(MechanismType::SHA512, PkcsMgfType::MGF1_SHA512, 64);
                Ok(session.sign(&Mechanism::Sha512RsaPkcsPss(pss), key, message)?)
            }
            _ => Err(ModuleError::Cannot("an unknown signature scheme")),
        }
    }
}

impl Opened {
    fn refusal(&self, error: &ModuleError) -> Refusal {
        Refusal::new(ErrorClass::Local, format!("key `{}`: {error}", self.uri))
    }

    /// The key that belongs to a public key, which it shows by a signature.
    fn find(&mut self, public: &[u8]) -> Result<Option<ObjectHandle>, ModuleError> {
        let keys = self.keys()?.1.clone();
        let public = SubjectPublicKeyInfoDer::from(public);
        let (Some((_, [first, ..])), Ok(owner)) = (kind_of(&public), webpki::RawPublicKeyEntity::try_from(&public)) else {
            return Ok(None);
        };
        let mut challenge = b"sealane: is this the key that is meant? ".to_vec();
        let mut random = [0; 32];
        SystemRandom::new().fill(&mut random).map_err(|_| ModuleError::Cannot("no random numbers"))?;
        challenge.extend(random);
        let all = strength::algorithms();
        let fitting: Vec<_> = all.mapping.iter().filter(|(known, _)| known == first).flat_map(|(_, all)| all.iter()).collect();
        for key in keys {
            // A key of another kind cannot do what is asked.
            let Ok(signature) = self.sign_with(key, *first, &challenge) else { continue };
            if fitting.iter().any(|algorithm| owner.verify_signature(**algorithm, &challenge, &signature).is_ok()) {
                return Ok(Some(key));
            }
        }
        Ok(None)
    }

    /// The one Ed25519 key that the URI names, by the public half that has to lie beside it: there is no certificate that says which.
    fn only_ed25519(&mut self) -> Result<(Vec<u8>, ObjectHandle), ModuleError> {
        let wanted = self.named(ObjectClass::PUBLIC_KEY);
        let (session, _) = self.keys()?;
        let mut halves = Vec::new();
        for object in session.find_objects(&wanted)?.into_iter().take(limits::TOKEN_KEYS_MAX.into()) {
            for attribute in session.get_attributes(object, &[AttributeType::EcPoint])? {
                let Attribute::EcPoint(point) = attribute else { continue };
                halves.extend(raw::ed25519_half(&point).map(|half| [ED25519_SPKI, half].concat()));
            }
        }
        halves.sort_unstable();
        halves.dedup();
        let mut found = Vec::new();
        for half in halves {
            found.extend(self.find(&half)?.map(|key| (half, key)));
        }
        match found.pop() {
            Some(one) if found.is_empty() => Ok(one),
            last => {
                let found = format!("{} Ed25519 keys with both halves", found.len().saturating_add(usize::from(last.is_some())));
                Err(ModuleError::Count { uri: self.uri.clone(), found, expected: "one, private and public key" })
            }
        }
    }

    fn try_open(&mut self, wanted: Option<&[u8]>) -> Result<Option<(Vec<u8>, ObjectHandle)>, ModuleError> {
        self.close();
        match wanted {
            Some(public) => Ok(self.find(public)?.map(|key| (public.to_vec(), key))),
            None => self.only_ed25519().map(Some),
        }
    }

    fn try_sign(&mut self, number: u16, scheme: SignatureScheme, message: &[u8]) -> Result<Vec<u8>, ModuleError> {
        let gone = || ModuleError::Cannot("there is no such key");
        let (public, known) = self.used.get(number).map(|(public, key)| (public.to_vec(), *key)).ok_or_else(gone)?;
        let key = match known {
            Some(key) => key,
            None => self.find(&public)?.ok_or_else(gone)?,
        };
        if let Some((_, used)) = self.used.get(number) {
            *used = Some(key);
        }
        self.sign_with(key, scheme, message)
    }
}

impl Keys for Opened {
    fn open(&mut self, wanted: Option<&[u8]>) -> Result<Option<(u16, Vec<u8>)>, Refusal> {
        let found = self.try_open(wanted).map_err(|error| self.refusal(&error))?;
        let Some((public, key)) = found else { return Ok(None) };
        let name = format!("key `{}`", self.uri);
        let number = self.used.open(&public, Some(key), &name)?;
        Ok(Some((number, public)))
    }

    fn forget(&mut self, key: u16) {
        self.used.forget(key);
    }

    /// A session that has gone with its token is opened anew once.
    fn sign(&mut self, key: u16, scheme: SignatureScheme, message: &[u8]) -> Result<Vec<u8>, Refusal> {
        let mut signed = self.try_sign(key, scheme, message);
        if let Err(ModuleError::Library(_)) = signed {
            self.close();
            signed = self.try_sign(key, scheme, message);
        }
        signed.map_err(|error| self.refusal(&error))
    }
}

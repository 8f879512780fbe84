//! Messages of D-Bus, as bytes (D-Bus Specification 0.43, "Message Protocol" and "Type System"): of
//! its types those that systemd's manager is asked with, and of answers what the shim looks at.
//!
//! Numbers are little-endian: every host podvmm runs on is, and a bus passes on what systemd wrote.

/// Longest message that is read, in bytes. systemd's answers have some hundred.
pub(super) const MAX_LEN: usize = 1 << 20;
/// What each message begins with: its byte order, kind, flags, version, lengths and serial number.
pub(super) const FIXED_LEN: usize = 16;

const LITTLE_ENDIAN: u8 = b'l';
const VERSION: u8 = 1;
const CALL: u8 = 1;

/// Kinds of messages that are read; others are passed over.
pub(super) const REPLY: u8 = 2;
pub(super) const ERROR: u8 = 3;
pub(super) const SIGNAL: u8 = 4;

/// Codes of header fields ("Header Fields").
mod field {
    pub(super) const PATH: u8 = 1;
    pub(super) const INTERFACE: u8 = 2;
    pub(super) const MEMBER: u8 = 3;
    pub(super) const ERROR_NAME: u8 = 4;
    pub(super) const REPLY_SERIAL: u8 = 5;
    pub(super) const DESTINATION: u8 = 6;
    pub(super) const SIGNATURE: u8 = 8;
}

/// A message that is not as the specification has it, and in what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a D-Bus message whose {0} makes no sense")]
pub(crate) struct Malformed(&'static str);

/// A property of a unit of systemd's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Property {
    pub(crate) name: &'static str,
    pub(crate) value: Value,
}

impl Property {
    pub(crate) fn new(name: &'static str, value: Value) -> Self {
        Self { name, value }
    }
}

/// The value of a property.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    Flag(bool),
    Number(u64),
    Numbers(Vec<u32>),
    Pairs(Vec<(String, String)>),
    Text(String),
}

impl Value {
    fn signature(&self) -> &'static str {
        match self {
            Self::Flag(_) => "b",
            Self::Number(_) => "t",
            Self::Numbers(_) => "au",
            Self::Pairs(_) => "a(ss)",
            Self::Text(_) => "s",
        }
    }
}

/// An argument of a call.
#[derive(Clone, Copy, Debug)]
pub(super) enum Argument<'a> {
    Flag(bool),
    /// No other units to be started together with one.
    NoUnits,
    Properties(&'a [Property]),
    Text(&'a str),
}

impl Argument<'_> {
    fn signature(self) -> &'static str {
        match self {
            Self::Flag(_) => "b",
            Self::NoUnits => "a(sa(sv))",
            Self::Properties(_) => "a(sv)",
            Self::Text(_) => "s",
        }
    }
}

/// What is called where.
#[derive(Clone, Copy, Debug)]
pub(super) struct Call<'a> {
    pub(super) destination: &'a str,
    pub(super) path: &'a str,
    pub(super) interface: &'a str,
    pub(super) method: &'a str,
    pub(super) arguments: &'a [Argument<'a>],
}

impl Call<'_> {
    /// The message, whose answer bears `serial`.
    pub(super) fn encode(&self, serial: u32) -> Vec<u8> {
        let mut body = Writer::default();
        let mut signature = String::new();
        for argument in self.arguments {
            signature.push_str(argument.signature());
            body.argument(*argument);
        }
        let mut message = Writer(vec![LITTLE_ENDIAN, CALL, 0, VERSION]);
        message.length(body.0.len());
        message.u32(serial);
        let texts = [
            (field::PATH, "o", self.path),
            (field::INTERFACE, "s", self.interface),
            (field::MEMBER, "s", self.method),
            (field::DESTINATION, "s", self.destination),
        ];
        message.array(8, |fields| {
            for (code, kind, text) in texts {
                fields.align(8);
                fields.0.push(code);
                fields.signature(kind);
                fields.text(text);
            }
            if !signature.is_empty() {
                fields.align(8);
                fields.0.push(field::SIGNATURE);
                fields.signature("g");
                fields.signature(&signature);
            }
        });
        message.align(8);
        message.0.extend(body.0);
        message.0
    }
}

/// A message being written. Values are aligned to their size, from the message's start.
#[derive(Debug, Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn align(&mut self, to: usize) {
        self.0.resize(self.0.len().next_multiple_of(to), 0);
    }

    fn u32(&mut self, value: u32) {
        self.align(4);
        self.0.extend(value.to_le_bytes());
    }

    fn length(&mut self, len: usize) {
        let len = u32::try_from(len).expect("a call has a few hundred bytes");
        self.u32(len);
    }

    fn text(&mut self, text: &str) {
        self.length(text.len());
        self.0.extend(text.bytes());
        self.0.push(0);
    }

    fn signature(&mut self, signature: &str) {
        let len = u8::try_from(signature.len()).expect("signatures here are short");
        self.0.push(len);
        self.0.extend(signature.bytes());
        self.0.push(0);
    }

    /// An array of values of this alignment. Its length leaves out the padding before the first.
    fn array(&mut self, alignment: usize, elements: impl FnOnce(&mut Self)) {
        self.u32(0);
        let length_at = self.0.len() - 4;
        self.align(alignment);
        let start = self.0.len();
        elements(self);
        let len = u32::try_from(self.0.len() - start).expect("a call has a few hundred bytes");
        self.0[length_at..length_at + 4].copy_from_slice(&len.to_le_bytes());
    }

    fn argument(&mut self, argument: Argument<'_>) {
        match argument {
            Argument::Flag(flag) => self.u32(flag.into()),
            Argument::NoUnits => self.array(8, |_| ()),
            Argument::Properties(properties) => self.array(8, |array| {
                for property in properties {
                    array.align(8);
                    array.text(property.name);
                    array.signature(property.value.signature());
                    array.value(&property.value);
                }
            }),
            Argument::Text(text) => self.text(text),
        }
    }

    fn value(&mut self, value: &Value) {
        match value {
            Value::Flag(flag) => self.u32((*flag).into()),
            Value::Number(number) => {
                self.align(8);
                self.0.extend(number.to_le_bytes());
            }
            Value::Numbers(numbers) => self.array(4, |array| {
                numbers.iter().for_each(|number| array.u32(*number));
            }),
            Value::Pairs(pairs) => self.array(8, |array| {
                for (first, second) in pairs {
                    array.align(8);
                    array.text(first);
                    array.text(second);
                }
            }),
            Value::Text(text) => self.text(text),
        }
    }
}

/// How many bytes of a message follow its first [`FIXED_LEN`], which are these.
pub(super) fn rest_len(fixed: &[u8; FIXED_LEN]) -> Result<usize, Malformed> {
    if fixed[0] != LITTLE_ENDIAN {
        return Err(Malformed("byte order"));
    }
    if fixed[3] != VERSION {
        return Err(Malformed("version"));
    }
    let mut reader = Reader {
        bytes: fixed,
        at: 4,
    };
    let body = reader.u32()?;
    reader.u32()?;
    let fields = reader.u32()?;
    let len = |len: u32| usize::try_from(len).map_err(|_| Malformed("length"));
    let fields = len(fields)?.checked_next_multiple_of(8);
    let total = fields.and_then(|fields| fields.checked_add(len(body).ok()?));
    total
        .filter(|total| *total <= MAX_LEN)
        .ok_or(Malformed("length"))
}

/// A message that came.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Message {
    pub(super) kind: u8,
    /// The serial number of the call that the message answers.
    pub(super) reply_serial: u32,
    /// The name of a signal.
    pub(super) member: String,
    pub(super) error_name: String,
    signature: String,
    body: Vec<u8>,
}

impl Message {
    /// Takes apart the whole of a message.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, Malformed> {
        let mut message = Self {
            kind: *bytes.get(1).ok_or(Malformed("length"))?,
            ..Self::default()
        };
        let mut reader = Reader { bytes, at: 12 };
        let len = usize::try_from(reader.u32()?).map_err(|_| Malformed("length"))?;
        let end = reader.at.checked_add(len).ok_or(Malformed("length"))?;
        while reader.at < end {
            reader.align(8);
            let code = reader.take(1)?[0];
            let kind = reader.signature()?;
            let mut text = String::new();
            match kind.as_str() {
                "s" | "o" => text = reader.text()?,
                "g" => text = reader.signature()?,
                "u" if code == field::REPLY_SERIAL => message.reply_serial = reader.u32()?,
                "u" => drop(reader.u32()?),
                _ => return Err(Malformed("header field")),
            }
            match code {
                field::MEMBER => message.member = text,
                field::ERROR_NAME => message.error_name = text,
                field::SIGNATURE => message.signature = text,
                _ => {}
            }
        }
        reader.align(8);
        message.body = bytes.get(reader.at..).ok_or(Malformed("length"))?.into();
        Ok(message)
    }

    /// What it says in its `N` first arguments, which are texts, or numbers to be passed over.
    pub(super) fn texts<const N: usize>(&self) -> Result<[String; N], Malformed> {
        let mut reader = Reader {
            bytes: &self.body,
            at: 0,
        };
        let mut kinds = self.signature.chars();
        let mut texts = [const { String::new() }; N];
        for text in &mut texts {
            match kinds.next() {
                Some('s' | 'o') => *text = reader.text()?,
                Some('u') => drop(reader.u32()?),
                _ => return Err(Malformed("signature")),
            }
        }
        Ok(texts)
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], Malformed> {
        let end = self.at.checked_add(len).ok_or(Malformed("length"))?;
        let taken = self.bytes.get(self.at..end).ok_or(Malformed("length"))?;
        self.at = end;
        Ok(taken)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.align(4);
        let bytes = self.take(4)?.try_into().map_err(|_| Malformed("length"))?;
        Ok(u32::from_le_bytes(bytes))
    }

    fn text(&mut self) -> Result<String, Malformed> {
        let len = usize::try_from(self.u32()?).map_err(|_| Malformed("length"))?;
        self.text_of(len)
    }

    fn signature(&mut self) -> Result<String, Malformed> {
        let len = self.take(1)?[0];
        self.text_of(len.into())
    }

    fn text_of(&mut self, len: usize) -> Result<String, Malformed> {
        let text = self.take(len)?.to_vec();
        // A zero byte follows each text.
        self.take(1)?;
        String::from_utf8(text).map_err(|_| Malformed("text"))
    }
}

/// Messages as systemd sends them, for tests.
#[cfg(test)]
pub(super) fn answer(kind: u8, serial: u32, name: (u8, &str), texts: &[&str]) -> Vec<u8> {
    let mut body = Writer::default();
    texts.iter().for_each(|text| body.text(text));
    let mut message = Writer(vec![LITTLE_ENDIAN, kind, 0, VERSION]);
    message.length(body.0.len());
    message.u32(7);
    message.array(8, |fields| {
        fields.0.push(field::REPLY_SERIAL);
        fields.signature("u");
        fields.u32(serial);
        fields.align(8);
        fields.0.push(name.0);
        fields.signature("s");
        fields.text(name.1);
        fields.align(8);
        fields.0.push(field::SIGNATURE);
        fields.signature("g");
        fields.signature(&"s".repeat(texts.len()));
    });
    message.align(8);
    message.0.extend(body.0);
    message.0
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The arguments are as zbus 6.2.1 encodes them.
    #[test]
    fn a_call_is_as_another_implementation_has_it() {
        let pair = |first: &str, second: &str| (first.to_owned(), second.to_owned());
        let properties = [
            Property::new("Delegate", Value::Flag(true)),
            Property::new("CPUWeight", Value::Number(100)),
            Property::new("PIDs", Value::Numbers(vec![5])),
            Property::new("Slice", Value::Text("a.slice".into())),
            Property::new(
                "DeviceAllow",
                Value::Pairs(vec![pair("/dev/kvm", "rw"), pair("char-*", "m")]),
            ),
        ];
        let call = Call {
            destination: "org.x",
            path: "/x",
            interface: "org.x.M",
            method: "Go",
            arguments: &[
                Argument::Text("a.scope"),
                Argument::Text("replace"),
                Argument::Properties(&properties),
                Argument::NoUnits,
            ],
        };
        let bytes = call.encode(3);
        let fixed = bytes.first_chunk().unwrap();
        assert_eq!(rest_len(fixed), Ok(bytes.len() - FIXED_LEN));
        assert_eq!(&bytes[..4], b"l\x01\x00\x01");
        assert_eq!(&bytes[8..12], &3_u32.to_le_bytes());
        assert_eq!(&bytes[16..27], b"\x01\x01o\0\x02\0\0\0/x\0");
        let signature = b"\x08\x01g\0\x10ssa(sv)a(sa(sv))\0";
        assert!(bytes.windows(signature.len()).any(|part| part == signature));
        let body = b"\x07\0\0\0a.scope\0\x07\0\0\0replace\0\xba\0\0\0\0\0\0\0\
            \x08\0\0\0Delegate\0\x01b\0\x01\0\0\0\0\0\0\0\
            \t\0\0\0CPUWeight\0\x01t\0\0\0\0\0\0\0\0d\0\0\0\0\0\0\0\
            \x04\0\0\0PIDs\0\x02au\0\0\0\0\x04\0\0\0\x05\0\0\0\
            \x05\0\0\0Slice\0\x01s\0\0\0\0\x07\0\0\0a.slice\0\0\0\0\0\
            \x0b\0\0\0DeviceAllow\0\x05a(ss)\0\0*\0\0\0\0\0\0\0\
            \x08\0\0\0/dev/kvm\0\0\0\0\x02\0\0\0rw\0\0\
            \x06\0\0\0char-*\0\0\x01\0\0\0m\0\0\0\0\0\0\0";
        let tail = &bytes[bytes.len() - body.len()..];
        assert_eq!(
            tail.escape_ascii().to_string(),
            body.escape_ascii().to_string()
        );
        assert_eq!(
            &bytes[4..8],
            &u32::try_from(body.len()).unwrap().to_le_bytes()
        );
    }

    #[test]
    fn an_answer_is_taken_apart() {
        let bytes = answer(ERROR, 9, (field::ERROR_NAME, "org.x.No"), &["because"]);
        let rest = rest_len(bytes.first_chunk().unwrap());
        assert_eq!(rest, Ok(bytes.len() - FIXED_LEN));
        let message = Message::decode(&bytes).unwrap();
        assert_eq!((message.kind, message.reply_serial), (ERROR, 9));
        assert_eq!(message.error_name, "org.x.No");
        assert_eq!(message.texts(), Ok(["because".to_owned()]));
        assert_eq!(message.texts::<2>(), Err(Malformed("signature")));
    }

    #[test]
    fn a_message_may_not_be_of_any_length() {
        let mut fixed = [0; FIXED_LEN];
        fixed[0] = LITTLE_ENDIAN;
        fixed[3] = VERSION;
        fixed[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(rest_len(&fixed), Err(Malformed("length")));
        fixed[0] = b'B';
        assert_eq!(rest_len(&fixed), Err(Malformed("byte order")));
    }

    proptest! {
        #[test]
        fn bytes_of_any_kind_are_a_message_or_none(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Ok(message) = Message::decode(&bytes) {
                let _ = message.texts::<3>();
            }
        }
    }
}

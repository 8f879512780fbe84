//! Where a process's output goes, as containerd's clients write it: the path of a FIFO or a file, or a
//! URI of one of two schemes (containerd, core/runtime/v2/README.md, "Logging").

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use super::Error;

/// Where output goes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Output {
    /// A FIFO, or whatever there is.
    Path(PathBuf),
    /// `file://`: a file, made with the folders above it.
    File(PathBuf),
    /// `binary://`: a program that is started for it, with these arguments.
    Binary {
        program: PathBuf,
        arguments: Vec<OsString>,
    },
}

impl Output {
    pub(super) fn parse(text: &str) -> Result<Self, Error> {
        let Some((scheme, rest)) = text.split_once("://") else {
            return Ok(Self::Path(text.into()));
        };
        let malformed = |why| Error::Uri {
            uri: text.into(),
            why,
        };
        let rest = rest.split('#').next().unwrap_or_default();
        let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
        // What comes before the path is a host's name, which means nothing here.
        let path = place.find('/').map(|start| &place[start..]);
        let path = path.ok_or_else(|| malformed("it has no absolute path"))?;
        let path = decode(path, false).ok_or_else(|| malformed("a % is no escape"))?;
        let path = PathBuf::from(OsString::from_vec(path));
        match scheme {
            "fifo" => Ok(Self::Path(path)),
            "file" => Ok(Self::File(path)),
            "binary" => Ok(Self::Binary {
                program: path,
                arguments: arguments(query).ok_or_else(|| malformed("a % is no escape"))?,
            }),
            _ => Err(malformed("only fifo, file and binary are possible")),
        }
    }
}

/// Each name and its value are two arguments. Of a name that comes again the first value counts.
fn arguments(query: &str) -> Option<Vec<OsString>> {
    let mut names: Vec<Vec<u8>> = Vec::new();
    let mut arguments = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let (name, value) = (decode(name, true)?, decode(value, true)?);
        if !names.contains(&name) {
            arguments.extend([name.clone(), value].map(OsString::from_vec));
            names.push(name);
        }
    }
    Some(arguments)
}

/// Without its escapes (RFC 3986, section 2.1); in a query a plus is a space.
fn decode(text: &str, is_query: bool) -> Option<Vec<u8>> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                u8::try_from(digit()? << 4 | digit()?).ok()?
            }
            b'+' if is_query => b' ',
            byte => byte,
        });
    }
    // No path or argument can have one.
    (!decoded.contains(&0)).then_some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_goes_where_the_uri_says() {
        let binary = |program: &str, arguments: &[&str]| Output::Binary {
            program: program.into(),
            arguments: arguments.iter().map(OsString::from).collect(),
        };
        for (text, expected) in [
            ("/run/fifo", Output::Path("/run/fifo".into())),
            ("a%20b", Output::Path("a%20b".into())),
            ("fifo:///run/a%20b", Output::Path("/run/a b".into())),
            ("file:///var/log/x", Output::File("/var/log/x".into())),
            ("binary:///bin/log", binary("/bin/log", &[])),
            (
                "binary:///usr/bin/nerdctl?_NERDCTL_INTERNAL_LOGGING=%2Fvar%2Flib",
                binary(
                    "/usr/bin/nerdctl",
                    &["_NERDCTL_INTERNAL_LOGGING", "/var/lib"],
                ),
            ),
            (
                "binary:///log?b=1+2&a&b=3#end",
                binary("/log", &["b", "1 2", "a", ""]),
            ),
        ] {
            assert_eq!(Output::parse(text).unwrap(), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_uri_of_ours_is_refused() {
        for (text, why) in [
            (
                "https://host/log",
                "only fifo, file and binary are possible",
            ),
            ("binary://log", "it has no absolute path"),
            ("file:///a%2", "a % is no escape"),
            ("file:///a%+1", "a % is no escape"),
            ("binary:///log?a=%00", "a % is no escape"),
        ] {
            let error = Output::parse(text).unwrap_err().to_string();
            assert_eq!(error, format!("stream {text}: {why}"));
        }
    }
}

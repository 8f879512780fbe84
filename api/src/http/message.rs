//! A request and an answer, and how an answer is written.

use std::fmt::Write;
use std::os::fd::OwnedFd;

/// What a request wants done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Method {
    Get,
    Put,
    /// Another method, by its name. Nothing here answers to it, but the answer says so.
    Other(String),
}

impl From<&str> for Method {
    fn from(name: &str) -> Self {
        match name {
            "GET" => Self::Get,
            "PUT" => Self::Put,
            other => Self::Other(other.into()),
        }
    }
}

impl std::fmt::Display for Method {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Get => "GET",
            Self::Put => "PUT",
            Self::Other(name) => name,
        })
    }
}

/// One request, whole.
#[derive(Debug)]
pub struct Request {
    pub method: Method,
    /// Path of the request, without a query.
    pub path: String,
    pub body: Vec<u8>,
    /// What came by SCM_RIGHTS with any part of it.
    pub fds: Vec<OwnedFd>,
}

/// One answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    pub status: u16,
    pub content_type: &'static str,
    pub body: Vec<u8>,
}

impl Response {
    /// 204: done, and nothing to say.
    pub fn done() -> Self {
        Self::json(204, String::new())
    }

    pub fn json(status: u16, body: String) -> Self {
        Self {
            status,
            content_type: "application/json",
            body: body.into_bytes(),
        }
    }

    pub fn text(body: String) -> Self {
        Self {
            status: 200,
            content_type: "text/plain; version=0.0.4",
            body: body.into_bytes(),
        }
    }

    /// A refusal: a JSON array of an error and its causes, outermost first.
    pub fn refusal<'a>(status: u16, errors: impl IntoIterator<Item = &'a str>) -> Self {
        let mut body = String::from("[");
        for error in errors {
            if body.len() > 1 {
                body.push(',');
            }
            push_json(&mut body, error);
        }
        body.push(']');
        Self::json(status, body)
    }

    /// The answer as it goes over the wire.
    ///
    /// Kata's Rust client takes all between the version and the line's end for the status, so no
    /// reason phrase follows it. Only 429 has one: Kata's Go client looks for its words, and the
    /// other takes a 429 for an error either way.
    pub(super) fn encode(&self, keep_alive: bool) -> Vec<u8> {
        let reason = if self.status == 429 {
            "Too Many Requests"
        } else {
            ""
        };
        let connection = if keep_alive { "keep-alive" } else { "close" };
        let mut head = format!(
            "HTTP/1.1 {} {reason}\r\nConnection: {connection}\r\n",
            self.status
        );
        // "A server MUST NOT send a Content-Length header field in any response with a status code
        // of 1xx (Informational) or 204 (No Content)" (RFC 9110 §8.6).
        if self.status != 204 {
            let _ = write!(
                head,
                "Content-Type: {}\r\nContent-Length: {}\r\n",
                self.content_type,
                self.body.len()
            );
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        if self.status != 204 {
            bytes.extend_from_slice(&self.body);
        }
        bytes
    }
}

/// Adds `text` as a JSON string of ASCII alone: Kata's Rust client decodes answers piece by piece
/// and panics where a piece ends within a character.
pub(crate) fn push_json(out: &mut String, text: &str) {
    out.push('"');
    for unit in text.encode_utf16() {
        match char::from_u32(unit.into()) {
            Some(char @ ('"' | '\\')) => out.extend(['\\', char]),
            Some(char @ ' '..='~') => out.push(char),
            _ => {
                let _ = write!(out, "\\u{unit:04x}");
            }
        }
    }
    out.push('"');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(response: &Response, keep_alive: bool) -> String {
        String::from_utf8(response.encode(keep_alive)).unwrap()
    }

    #[test]
    fn a_status_has_no_reason_and_a_204_no_body() {
        assert_eq!(
            text(&Response::done(), true),
            "HTTP/1.1 204 \r\nConnection: keep-alive\r\n\r\n"
        );
        assert_eq!(
            text(&Response::json(200, "{}".into()), false),
            "HTTP/1.1 200 \r\nConnection: close\r\nContent-Type: application/json\r\n\
             Content-Length: 2\r\n\r\n{}"
        );
    }

    #[test]
    fn only_429_says_why() {
        let busy = Response::refusal(429, ["later"]);
        assert!(text(&busy, true).starts_with("HTTP/1.1 429 Too Many Requests\r\n"));
    }

    #[test]
    fn an_empty_answer_says_that_it_is_empty() {
        assert!(text(&Response::json(200, String::new()), true).contains("Content-Length: 0\r\n"));
    }

    #[test]
    fn errors_are_ascii_whatever_a_path_contains() {
        let refusal = Response::refusal(400, ["a \"b\"\n", "zu groß 🦀"]);
        assert_eq!(
            String::from_utf8(refusal.body.clone()).unwrap(),
            r#"["a \"b\"\u000a","zu gro\u00df \ud83e\udd80"]"#
        );
        let back: Vec<String> = serde_json::from_slice(&refusal.body).unwrap();
        assert_eq!(back, ["a \"b\"\n", "zu groß 🦀"]);
    }
}

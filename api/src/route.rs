//! From an HTTP request to what it asks, and from what it is answered to an HTTP response.

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::config::{
    Addition, DiskConfig, FsConfig, JsonError, NetConfig, Part, VmConfig, VsockConfig,
};
use crate::error::ApiError;
use crate::http;
use crate::http::{Method, Response};

use crate::request::{Answer, Request, Restore};

/// What all paths begin with, but that of the metrics.
pub const PREFIX: &str = "/api/v1/";

type Parse = fn(&str, http::Request) -> Result<Request, ApiError>;

/// One endpoint.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    pub method: &'static str,
    pub path: &'static str,
    parse: Parse,
}

const fn get(path: &'static str, parse: Parse) -> Route {
    Route {
        method: "GET",
        path,
        parse,
    }
}

const fn put(path: &'static str, parse: Parse) -> Route {
    Route {
        method: "PUT",
        path,
        parse,
    }
}

/// All endpoints.
pub const ROUTES: &[Route] = &[
    get("/api/v1/vmm.ping", |_, _| Ok(Request::Ping)),
    put("/api/v1/vmm.shutdown", |_, _| Ok(Request::Exit)),
    put("/api/v1/vm.create", |_, request| {
        let vm = VmConfig::parse(&request.body).map_err(body_of("vm.create"))?;
        Ok(Request::Create(Box::new(vm)))
    }),
    put("/api/v1/vm.add-disk", |_, request| {
        let disk = DiskConfig::from_json(&request.body);
        add("vm.add-disk", disk.map(Addition::Disk))
    }),
    put("/api/v1/vm.add-fs", |_, request| {
        add(
            "vm.add-fs",
            FsConfig::from_json(&request.body).map(Addition::Fs),
        )
    }),
    put("/api/v1/vm.add-net", |_, request| {
        let net = NetConfig::passed(&request.body, request.fds);
        add("vm.add-net", net.map(Addition::Net))
    }),
    put("/api/v1/vm.add-vsock", |_, request| {
        let vsock = VsockConfig::from_json(&request.body);
        add("vm.add-vsock", vsock.map(Addition::Vsock))
    }),
    put("/api/v1/vm.remove-device", |_, request| {
        let RemoveDevice { id } = json("vm.remove-device", &request.body)?;
        Ok(Request::Remove(id))
    }),
    put("/api/v1/vm.resize-disk", |_, request| {
        Ok(Request::ResizeDisk(json("vm.resize-disk", &request.body)?))
    }),
    put("/api/v1/vm.boot", |_, _| Ok(Request::Boot)),
    get("/api/v1/vm.info", |_, _| Ok(Request::Info)),
    get("/api/v1/vm.counters", |_, _| Ok(Request::Counters)),
    put("/api/v1/vm.pause", |_, _| Ok(Request::Pause)),
    put("/api/v1/vm.resume", |_, _| Ok(Request::Resume)),
    put("/api/v1/vm.resize", |_, request| {
        Ok(Request::Resize(json("vm.resize", &request.body)?))
    }),
    put("/api/v1/vm.power-button", |_, _| Ok(Request::PowerButton)),
    put("/api/v1/vm.shutdown", |_, _| Ok(Request::Shutdown)),
    put("/api/v1/vm.reboot", |_, _| Ok(Request::Reboot)),
    put("/api/v1/vm.delete", |_, _| Ok(Request::Delete)),
    put("/api/v1/vm.snapshot", |_, request| {
        Ok(Request::Snapshot(json("vm.snapshot", &request.body)?))
    }),
    put("/api/v1/vm.record-working-set", |_, _| {
        Ok(Request::RecordWorkingSet)
    }),
    put("/api/v1/vm.restore", |_, request| {
        let mut restore: Restore = json("vm.restore", &request.body)?;
        if restore.prefault {
            return Err(body_of("vm.restore")(JsonError::Unsupported {
                path: "prefault".into(),
                why: "RAM is read when it is touched; prefetch has the host read it ahead",
            }));
        }
        restore.fds = request.fds;
        Ok(Request::Restore(Box::new(restore)))
    }),
    get("/metrics", |_, _| Ok(Request::Metrics)),
];

#[derive(Deserialize)]
struct RemoveDevice {
    id: String,
}

fn add(request: &'static str, addition: Result<Addition, JsonError>) -> Result<Request, ApiError> {
    addition.map(Request::Add).map_err(body_of(request))
}

fn body_of(request: &'static str) -> impl Fn(JsonError) -> ApiError {
    move |source| ApiError::Body { request, source }
}

/// What `request` asks.
pub fn request(request: http::Request) -> Result<Request, ApiError> {
    let path = request.path.clone();
    let Some(route) = ROUTES.iter().find(|route| route.path == path) else {
        return Err(ApiError::NoSuchEndpoint(path));
    };
    let expected = Method::from(route.method);
    if request.method != expected {
        return Err(ApiError::Method {
            path,
            expected: route.method,
            found: request.method.to_string(),
        });
    }
    (route.parse)(&path, request)
}

/// The HTTP response that tells `answer`.
pub fn response(answer: &Result<Answer, ApiError>) -> Response {
    match answer {
        Ok(Answer::Done) => Response::done(),
        Ok(Answer::Exiting) => Response::json(200, String::new()),
        Ok(Answer::Ping(ping)) => body(ping),
        Ok(Answer::Info(info)) => body(info),
        Ok(Answer::Plugged(plugged)) => body(plugged),
        Ok(Answer::Counters(counters)) => body(counters),
        Ok(Answer::Metrics(text)) => Response::text(text.clone()),
        Err(error) => {
            let chain = error.chain();
            Response::refusal(error.status(), chain.iter().map(String::as_str))
        }
    }
}

fn body(value: &impl serde::Serialize) -> Response {
    match serde_json::to_value(value) {
        Ok(value) => Response::json(200, crate::json::ascii(&value)),
        Err(error) => Response::refusal(500, [error.to_string().as_str()]),
    }
}

fn json<T: DeserializeOwned>(request: &'static str, body: &[u8]) -> Result<T, ApiError> {
    let value = crate::json::value(body);
    value
        .and_then(crate::json::from_value)
        .map_err(|error| body_of(request)(error.into()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::CpuCount;

    fn ask(method: &str, path: &str, body: &str) -> Result<Request, ApiError> {
        request(http::Request {
            method: method.into(),
            path: path.into(),
            body: body.into(),
            fds: Vec::new(),
        })
    }

    fn refusal(method: &str, path: &str, body: &str) -> (u16, String) {
        let error = ask(method, path, body).unwrap_err();
        (error.status(), error.chain().join(": "))
    }

    #[test]
    fn each_path_is_one_request() {
        assert!(matches!(
            ask("GET", "/api/v1/vmm.ping", ""),
            Ok(Request::Ping)
        ));
        assert!(matches!(
            ask("PUT", "/api/v1/vm.boot", "{}"),
            Ok(Request::Boot)
        ));
        let mut paths: Vec<_> = ROUTES.iter().map(|route| route.path).collect();
        paths.sort_unstable();
        paths.dedup();
        assert_eq!(paths.len(), ROUTES.len());
    }

    #[test]
    fn what_is_not_there_is_named() {
        assert_eq!(
            refusal("GET", "/api/v1/vm.fly", ""),
            (404, "/api/v1/vm.fly: there is no such endpoint".into())
        );
        assert_eq!(
            refusal("POST", "/api/v1/vm.boot", ""),
            (405, "/api/v1/vm.boot takes PUT, not POST".into())
        );
    }

    #[test]
    fn a_resize_may_have_nulls_and_unknown_fields() {
        let body = r#"{"desired_vcpus":2,"desired_ram":null,"color":"red"}"#;
        let Ok(Request::Resize(resize)) = ask("PUT", "/api/v1/vm.resize", body) else {
            panic!("refused");
        };
        assert_eq!(resize.desired_vcpus.map(CpuCount::get), Some(2));
        assert_eq!(resize.desired_ram, None);
    }

    #[test]
    fn snapshots_are_folders() {
        let body = r#"{"destination_url":"file:///run/s","incremental":true}"#;
        let Ok(Request::Snapshot(snapshot)) = ask("PUT", "/api/v1/vm.snapshot", body) else {
            panic!("refused");
        };
        assert_eq!(snapshot.folder.to_str(), Some("/run/s"));
        assert!(snapshot.incremental);
        let body = r#"{"source_url":"file:///run/s","prefetch":true,"memory_restore_mode":"Copy"}"#;
        let Ok(Request::Restore(restore)) = ask("PUT", "/api/v1/vm.restore", body) else {
            panic!("refused");
        };
        assert!(restore.prefetch && !restore.resume && !restore.verify);
        assert_eq!(restore.memory_socket, None);
        for mode in ["OnDemand", "CopyOnWrite"] {
            let body = format!(
                r#"{{"source_url":"file:///s","memory_restore_mode":"{mode}","prefault":false}}"#
            );
            ask("PUT", "/api/v1/vm.restore", &body).unwrap();
        }
        let body = r#"{"source_url":"file:///s","memory_restore_mode":"Lazy"}"#;
        let (_, why) = refusal("PUT", "/api/v1/vm.restore", body);
        assert!(
            why.contains("memory_restore_mode: unknown variant `Lazy`"),
            "{why}"
        );
        let body = r#"{"source_url":"file:///s","prefault":true}"#;
        let (status, why) = refusal("PUT", "/api/v1/vm.restore", body);
        assert_eq!(status, 400);
        assert!(
            why.contains("prefault: RAM is read when it is touched"),
            "{why}"
        );
        for url in ["/run/s", "file://run/s", "http:///s"] {
            let body = format!(r#"{{"source_url":"{url}"}}"#);
            let (status, why) = refusal("PUT", "/api/v1/vm.restore", &body);
            assert_eq!(status, 400);
            assert_eq!(
                why,
                "the body is not what vm.restore takes: source_url: it is not file:///FOLDER"
            );
        }
    }

    #[test]
    fn a_bad_body_says_where() {
        let (status, why) = refusal("PUT", "/api/v1/vm.resize", r#"{"desired_vcpus":"two"}"#);
        assert_eq!(status, 400);
        assert!(
            why.starts_with("the body is not what vm.resize takes: desired_vcpus: invalid type"),
            "{why}"
        );
        let (_, why) = refusal("PUT", "/api/v1/vm.resize", "{");
        assert!(why.contains("EOF while parsing"), "{why}");
    }
}

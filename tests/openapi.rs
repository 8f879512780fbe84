//! resources/openapi.yaml says what the code does.

use api::http::Request;
use api::route::ROUTES;
use api::{Definition, Resize};
use serde_json::Value;

fn document() -> Value {
    serde_norway::from_str(include_str!("../resources/openapi.yaml")).expect("it is YAML")
}

#[test]
fn every_route_is_described_and_every_path_is_a_route() {
    let document = document();
    let paths = document["paths"].as_object().unwrap();
    let mut described: Vec<(String, String)> = Vec::new();
    for (path, methods) in paths {
        for method in methods.as_object().unwrap().keys() {
            described.push((method.to_uppercase(), path.clone()));
        }
    }
    let mut routes: Vec<(String, String)> = ROUTES
        .iter()
        .map(|route| (route.method.into(), route.path.into()))
        .collect();
    described.sort();
    routes.sort();
    assert_eq!(described, routes);
}

#[test]
fn the_examples_are_understood_and_name_every_field() {
    let document = document();
    let schemas = &document["components"]["schemas"];
    let example = |name: &str| schemas[name]["example"].to_string();
    Definition::parse(example("VmConfig").as_bytes()).unwrap();
    let resize: Resize = serde_json::from_str(&example("VmResize")).unwrap();
    assert_eq!(resize.desired_vcpus, Some(2));
    for (path, name) in [("vm.snapshot", "Snapshot"), ("vm.restore", "Restore")] {
        let body = example(name).into_bytes();
        let path = format!("{}{path}", api::route::PREFIX);
        api::route::request(Request {
            method: "PUT".into(),
            path,
            body,
            fds: Vec::new(),
        })
        .unwrap();
    }
    for name in ["VmConfig", "VmResize", "Snapshot", "Restore"] {
        let properties = schemas[name]["properties"].as_object().unwrap();
        let shown = schemas[name]["example"].as_object().unwrap();
        assert!(properties.keys().eq(shown.keys()), "{name}");
    }
}

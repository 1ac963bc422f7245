//! What clients want created: what is read in it, changed in it, and known of it.

use super::*;

#[tokio::test]
async fn what_a_container_is_given_is_known_before_its_client_knows_of_it() {
    let mut stage = stage(None);
    let body = r#"{"HostConfig":{"Binds":["/here/docker.sock:/s"]}}"#;
    let create = |body: &str| {
        format!("POST /v1.45/containers/create HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    };
    stage.client.write_all(create(body).as_bytes()).await.unwrap();
    let mut engine = stage.dials.recv().await.unwrap();
    expect(&mut engine, &create(&body.replace("/here", "/run"))).await;
    let answer = "HTTP/1.1 201 Created\r\nContent-Length: 11\r\n\r\n{\"Id\":\"c1\"}";
    engine.write_all(answer.as_bytes()).await.unwrap();
    expect(&mut stage.client, answer).await;
    let given = stage.given.lock().unwrap().clone();
    assert_eq!(given, [("c1".to_owned(), "/run/docker.sock".to_owned())]);
    stage.leave().await;
}

#[tokio::test]
async fn who_has_a_containers_volumes_is_given_what_that_one_was_given() {
    let mut stage = stage(None);
    let create = |from: &str| {
        let body = format!(r#"{{"HostConfig":{{"VolumesFrom":[{from}]}}}}"#);
        format!("POST /containers/create HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    };
    let mut engine = stage.ask(&create(r#""web:ro","unknown","/db""#)).await;
    let answer = "HTTP/1.1 201 Created\r\nContent-Length: 11\r\n\r\n{\"Id\":\"c1\"}";
    engine.write_all(answer.as_bytes()).await.unwrap();
    expect(&mut stage.client, answer).await;
    let given = stage.given.lock().unwrap().clone();
    assert_eq!(given, ["/mnt/db", "/mnt/web"].map(|path| ("c1".to_owned(), path.to_owned())));
    stage.client.write_all(create(r#""nobody-knows""#).as_bytes()).await.unwrap();
    let mut answer = String::new();
    stage.client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("all are in use"), "{answer}");
}

#[tokio::test]
async fn an_old_client_reaches_the_engine_with_binds_for_its_mounts() {
    let mut stage = stage(None);
    let body = r#"{"HostConfig":{"Mounts":[{"Type":"bind","Source":"/here/docker.sock","Target":"/s"}]}}"#;
    let arrives = r#"{"HostConfig":{"Mounts":[],"Binds":["/run/docker.sock:/s"]}}"#;
    let create = |body: &str| {
        format!("POST /v1.41/containers/create HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    };
    stage.client.write_all(create(body).as_bytes()).await.unwrap();
    let mut engine = stage.dials.recv().await.unwrap();
    expect(&mut engine, &create(arrives)).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_created_for_a_client_that_is_gone_is_known_if_the_engine_says_so_in_time() {
    let body = r#"{"HostConfig":{"PortBindings":{"80/tcp":[{"HostPort":""}]}}}"#;
    let request = format!("POST /containers/create HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    for (answers_after, whose) in [(CREATED_WITHIN / 2, "c1"), (CREATED_WITHIN * 2, "nobody")] {
        let mut stage = stage(None);
        stage.client.write_all(request.as_bytes()).await.unwrap();
        let mut engine = stage.dials.recv().await.unwrap();
        expect(&mut engine, "POST").await;
        let numbers = Arc::clone(&stage.numbers);
        let left = tokio::spawn(stage.leave());
        sleep(answers_after).await;
        let answer = "HTTP/1.1 201 Created\r\nContent-Length: 11\r\n\r\n{\"Id\":\"c1\"}";
        let _ = engine.write_all(answer.as_bytes()).await;
        left.await.unwrap();
        assert_eq!(*numbers.lock().unwrap(), [(whose.to_owned(), vec![20_000])]);
    }
}

#[tokio::test]
async fn a_wish_that_is_not_understood_never_reaches_the_engine() {
    let mut stage = stage(None);
    let request = "POST /containers/create HTTP/1.1\r\nContent-Length: 3\r\n\r\n{}}";
    stage.client.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stage.client.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 ") && answer.contains("invalid JSON"), "{answer}");
    assert!(stage.dials.try_recv().is_err());
}

#[tokio::test]
async fn numbers_that_were_chosen_are_the_containers_if_it_is_created_and_else_nobodys() {
    let mut stage = stage(None);
    let body = r#"{"HostConfig":{"PortBindings":{"80/tcp":[{"HostPort":""}]}}}"#;
    let request = format!("POST /containers/create HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len());
    for (status, answer, whose) in
        [("201 Created", r#"{"Id":"c1"}"#, "c1"), ("404 Not Found", "{}", "nobody")]
    {
        stage.client.write_all(request.as_bytes()).await.unwrap();
        let mut engine = stage.dials.recv().await.unwrap();
        expect(&mut engine, "POST").await;
        let answer = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{answer}", answer.len());
        engine.write_all(answer.as_bytes()).await.unwrap();
        expect(&mut stage.client, &answer).await;
        // The next request is begun when this one is over.
        stage.client.write_all(b"GET /_ping HTTP/1.1\r\n\r\n").await.unwrap();
        expect(&mut stage.client, "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK").await;
        let numbers = std::mem::take(&mut *stage.numbers.lock().unwrap());
        assert_eq!(numbers, [(whose.to_owned(), vec![20_000])]);
    }
    stage.client.write_all(request.as_bytes()).await.unwrap();
    let _engine = stage.dials.recv().await.unwrap();
    let numbers = Arc::clone(&stage.numbers);
    stage.leave().await;
    assert_eq!(*numbers.lock().unwrap(), [("nobody".to_owned(), vec![20_000])]);
}

#[tokio::test]
async fn a_body_that_was_looked_at_reaches_the_engine_unchanged_but_for_paths_and_ports() {
    let mut stage = stage(None);
    let socket = r#"{"HostConfig":{"Binds":["/here/docker.sock:/s"]}}"#;
    let theirs = r#"{"HostConfig":{"Binds":["/run/docker.sock:/s"]}}"#;
    let plain = r#"{"Image":"busybox","x":1}"#;
    let anywhere = r#"{"HostConfig":{"PortBindings":{"80/tcp":[{"HostPort":""}]}}}"#;
    let somewhere = r#"{"HostConfig":{"PortBindings":{"80/tcp":[{"HostPort":"20000"}]}}}"#;
    let all = r#"{"HostConfig":{"PublishAllPorts":true},"Image":"web"}"#;
    let chosen = r#"{"HostConfig":{"PublishAllPorts":true,"PortBindings":{"80/tcp":[{"HostIp":"","HostPort":"20000"}]}},"Image":"web"}"#;
    for (sent, arrives) in [(socket, theirs), (plain, plain), (anywhere, somewhere), (all, chosen), ("", "")]
    {
        let head = "POST /containers/create HTTP/1.1\r\nHost: d\r\n";
        let request = format!("{head}Expect: 100-continue\r\nContent-Length: {}\r\n\r\n", sent.len());
        stage.client.write_all(request.as_bytes()).await.unwrap();
        expect(&mut stage.client, "HTTP/1.1 100 Continue\r\n\r\n").await;
        stage.client.write_all(sent.as_bytes()).await.unwrap();
        let mut engine = stage.dials.recv().await.unwrap();
        expect(&mut engine, &format!("{head}Content-Length: {}\r\n\r\n{arrives}", arrives.len())).await;
        let answer = "HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\n{}";
        engine.write_all(answer.as_bytes()).await.unwrap();
        expect(&mut stage.client, answer).await;
    }
}

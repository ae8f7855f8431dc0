"""Pages to try a model on: one over a server in this process, one of plain files that needs no server.

sessions        what the server keeps of a conversation and its images
streaming       a question to an engine, and its answer as it grows
token_view      where tiles and tokens lie in an image, and what one token attends to
page_actions    what the events of the page do to a session
chat_page       the page, put together with gradio; stage.js and stage.css are its image
gate            what a browser may ask of the page's server
page_server     the server as a process
"""

"""Sixteen things to ask a chat model: of different lengths, and with answers of different lengths."""

PROMPTS: tuple[str, ...] = (
    "What is the capital of France?",
    "Write a haiku about autumn rain.",
    "Explain in two sentences why the sky is blue.",
    "Name three fruits that are rich in vitamin C.",
    "Translate to Spanish: 'Good morning, how are you today?'",
    "My sister is 12 years old and I am three years older than her. How old am I? Answer with a number.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "I have eggs, spinach, half an onion and some feta cheese left in my fridge. Suggest one simple dinner that I can "
    "cook in twenty minutes, and list the steps in order.",
    "Give me a title for a mystery novel set in a lighthouse.",
    "Summarise this in one sentence: The committee met on Tuesday to discuss the new library. After two hours of "
    "debate about the cost of the building, its location beside the river, and the risk of flooding, the members "
    "voted seven to four in favour of the project, on the condition that the ground floor be raised by one metre.",
    "Is a tomato a fruit or a vegetable? Say why in one sentence.",
    "Rewrite politely: Send me the report now, I have been waiting for two days.",
    "What is the difference between a list and a tuple in Python?",
    "Classify the mood of this review as positive or negative, with one word: 'The room was small and the heating did "
    "not work, the breakfast was cold, and when we complained, the man at the desk laughed at us. The view over the "
    "bay was lovely, but we will not come back, and we would not send our friends there either.'",
    "Tell me a short story about a robot that learns to paint.",
    "Here are the notes of a phone call. Turn them into a short e-mail to the customer. Notes: customer is called Ms "
    "Harper; her order 4417 was sent on the 3rd and has not arrived; the carrier says that it is stuck at the depot "
    "because the street name on the label is wrong; we will send a new parcel today by express at no cost; she need "
    "not return the first one if it turns up after all; we are sorry; she can reach us on the usual number until six.",
)
